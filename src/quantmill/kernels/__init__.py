"""Products with packed linears: `front_door` chooses among the backends. Light: no torch until one is asked."""
