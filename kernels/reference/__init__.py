"""The definition of every op, in plain torch. All other versions are tested against these."""
