"""The operator: composition root of what is decided once per cluster."""
