"""Training of the small chat model that ships in `assets/model/`."""
