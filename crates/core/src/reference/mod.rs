//! The specification: plain loops over f64, one file per stage.
