"""Row operations under the contract of `shared_specs`."""
