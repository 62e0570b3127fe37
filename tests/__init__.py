"""Tests, mirroring the packages. A package itself, so that helpers are imported as `tests.hbm.harness` whatever else is installed."""
