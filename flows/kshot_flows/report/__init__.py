"""How a run's results look: in the terminal, in MLflow, as pictures and tables."""
