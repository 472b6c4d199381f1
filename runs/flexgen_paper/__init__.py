"""What the FlexGen paper ran: seven HELM sub-scenarios and data wrangling."""
