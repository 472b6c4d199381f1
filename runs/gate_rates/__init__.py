"""How often gates on flips raise false alarms and catch drops."""
