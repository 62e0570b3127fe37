"""flexpert.hbm"""
