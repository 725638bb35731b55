"""How figures are shown: tables, charts and pages."""
