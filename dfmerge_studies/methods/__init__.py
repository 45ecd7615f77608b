"""The method table, and what a row of it says.  Nothing heavy is imported, so that names can be checked at once."""

from dfmerge_studies.methods.cells import cell_of, find_method, method_named, per_expert, with_coefficients
from dfmerge_studies.methods.choices import UNSCALED, Blocks, Coefficients, Estimator, Importance, Normalise, Scale
from dfmerge_studies.methods.parameter import Parameter, label
from dfmerge_studies.methods.row import SHARED, Method, coefficient_range, fixed_coefficients, importance_coefficient
from dfmerge_studies.methods.table import METHODS, STRENGTH, all_parameters, protected
from dfmerge_studies.points import Point

__all__ = [
    "METHODS",
    "SHARED",
    "STRENGTH",
    "UNSCALED",
    "Blocks",
    "Coefficients",
    "Estimator",
    "Importance",
    "Method",
    "Normalise",
    "Parameter",
    "Point",
    "Scale",
    "all_parameters",
    "cell_of",
    "coefficient_range",
    "find_method",
    "fixed_coefficients",
    "importance_coefficient",
    "label",
    "method_named",
    "per_expert",
    "protected",
    "with_coefficients",
]
