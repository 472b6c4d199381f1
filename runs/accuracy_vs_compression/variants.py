"""The variants that are compared with the 16-bit model."""

VARIANTS = ("w8", "w4", "w4-entropy", "w4-self", "w4-minmax", "w3", "w3-minmax", "kv4", "w4kv4", "s10", "w4kv4s10")
"""Names as behind the ``@`` of a model. A variant that is added here is evaluated, measured and reported."""
