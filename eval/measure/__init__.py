"""How one figure is measured: features, linear heads, predictions, rows."""
