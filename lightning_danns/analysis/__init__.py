"""What Dale's networks do, in plain torch."""
