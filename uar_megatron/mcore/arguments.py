def check_compatible(uar, args): pass
