//! The controller's configuration file.
