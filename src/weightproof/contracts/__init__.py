"""What a declared kind of edit owes, and the quantities that show whether it kept its word."""
