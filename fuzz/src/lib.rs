//! Nothing: a package of tests alone needs a library.
