"""MLflow tracking: runs, learning curves and stores."""
