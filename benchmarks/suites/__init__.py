"""The suites: the tests that timm and transformers have for their own models, on plain models and on models regularized in place."""
