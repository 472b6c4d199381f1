"""The evaluations of the FlexGen paper: seven HELM sub-scenarios and data wrangling."""
