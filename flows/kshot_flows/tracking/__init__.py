"""MLflow's runs and where it keeps them."""
