//! The program `portway`; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    portway::cli::main(std::env::args_os().collect())
}
