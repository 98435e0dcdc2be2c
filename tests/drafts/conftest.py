"""Lets the tests here import `tiny`."""
