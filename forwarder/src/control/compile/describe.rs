//! For people: rows of `get`, and everything about one Service with the reason for each thing that does not happen.
