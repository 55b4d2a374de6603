"""The world: network, data, measuring, cutting. Import from the modules; importing the package itself stays light."""
