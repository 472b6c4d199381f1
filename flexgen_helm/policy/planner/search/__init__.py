"""Search of the best policy: closed form, linear programme, rounding, ranking (FlexGen section 4.3). No torch."""
