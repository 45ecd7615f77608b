"""What people read: summaries, tables, model cards, exported models, figures."""
