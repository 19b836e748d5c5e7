#![forbid(unsafe_code)]

pub mod config_dir;
pub mod netlink;
