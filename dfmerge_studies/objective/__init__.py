"""One trial: coefficients -> merged model -> scores."""
