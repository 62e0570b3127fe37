"""flexpert.cli"""
