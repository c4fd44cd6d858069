"""When a result may be used again: products, their keys, and where they are kept."""
