"""The methods that train a router: one file and one equation each."""
