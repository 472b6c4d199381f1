"""What people see of a comparison: plots, pages, Markdown, CSV. No figure is computed here."""
