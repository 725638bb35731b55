"""How one accuracy is measured: features, linear heads, predictions, rows."""
