"""flexpert.controller"""
