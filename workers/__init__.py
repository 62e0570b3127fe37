"""flexpert.workers"""
