"""Making up for a cut: least squares with inputs, stored statistics without."""
