//! What a kernel file is, by its first bytes.
//!
//! An x86 kernel unpacks itself (`bzImage`, Documentation/arch/x86/boot.rst). An arm64 kernel does not: its boot protocol
//! wants the flat `Image` (Documentation/arch/arm64/booting.rst), and no firmware stands before it here that would unpack
//! another form. Virtualization.framework refuses compressed kernels too, so what boots here boots there.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::Arch;

/// Bytes that tell what a file is: up to the version number of the x86 boot protocol.
const HEAD: u64 = 0x208;

/// What a kernel's first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// `bzImage` for a PC.
    BzImage,
    /// Flat `Image` for arm64.
    Arm64,
    /// An EFI program that unpacks itself (`vmlinuz.efi`, CONFIG_EFI_ZBOOT).
    Zboot,
    /// Compressed by this program.
    Compressed(&'static str),
    /// An ELF file, such as `vmlinux` with a PVH entry.
    Elf,
    /// Something else.
    Unknown,
}

/// Whether `bytes` have `magic` at `offset`.
fn has(bytes: &[u8], offset: usize, magic: &[u8]) -> bool {
    bytes.get(offset..).is_some_and(|rest| rest.starts_with(magic))
}

/// What a file that begins with `head` is.
pub(super) fn form(head: &[u8]) -> Form {
    const COMPRESSED: [(&[u8], &str); 5] = [
        (b"\x1f\x8b", "gzip"),
        (b"\xfd7zXZ", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"BZh", "bzip2"),
    ];
    if has(head, 0x202, b"HdrS") {
        Form::BzImage
    } else if has(head, 56, b"ARM\x64") {
        Form::Arm64
    } else if has(head, 0, b"MZ") && has(head, 4, b"zimg") {
        Form::Zboot
    } else if has(head, 0, b"\x7fELF") {
        Form::Elf
    } else {
        let found = COMPRESSED.iter().find(|(magic, _)| head.starts_with(magic));
        found.map_or(Form::Unknown, |(_, program)| Form::Compressed(program))
    }
}

/// The first bytes of a file; fewer when it is shorter.
pub(super) fn head(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(HEAD).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Why `arch` cannot boot a kernel of this form, and what to do about it.
pub(super) fn check(path: &Path, form: Form, arch: Arch) -> Result<(), String> {
    let file = path.display();
    match (arch, form) {
        (Arch::Aarch64, Form::Compressed(program)) => {
            let unpack = if program == "gzip" { "gunzip" } else { program };
            let option = if program == "gzip" { "-c" } else { "-dc" };
            Err(format!(
                "it is compressed ({program}), and an arm64 kernel has to be the flat Image, because nothing unpacks it \
                 before it runs: {unpack} {option} < {file} > {file}-uncompressed"
            ))
        }
        (Arch::Aarch64, Form::Zboot) => Err(
            "it is an EFI program that unpacks itself (CONFIG_EFI_ZBOOT), and a direct boot needs the flat Image: boot it \
             from a disk or ISO with --uefi, or take the Image of the kernel's build"
                .into(),
        ),
        (Arch::Aarch64, Form::BzImage) => {
            Err("it is a kernel for x86_64 and the guest is to be aarch64: --arch x86_64".into())
        }
        (Arch::X86_64, Form::Arm64 | Form::Zboot) => {
            Err("it is a kernel for aarch64 and the guest is to be x86_64: --arch aarch64".into())
        }
        (Arch::X86_64, Form::Compressed(program)) => {
            Err(format!("it is compressed as a whole ({program}): a PC boots a bzImage or an ELF kernel; unpack it"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(offset: usize, magic: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 0x208];
        bytes[offset..offset + magic.len()].copy_from_slice(magic);
        bytes
    }

    #[test]
    fn kernels_are_known_by_their_magic() {
        assert_eq!(form(&bytes(0x202, b"HdrS")), Form::BzImage);
        assert_eq!(form(&bytes(56, b"ARM\x64")), Form::Arm64);
        assert_eq!(form(b"\x1f\x8b\x08"), Form::Compressed("gzip"));
        assert_eq!(form(b"\x7fELF"), Form::Elf);
        assert_eq!(form(b"MZ\0\0zimg"), Form::Zboot);
        assert_eq!(form(b""), Form::Unknown);
    }

    #[test]
    fn a_compressed_arm64_kernel_is_refused_with_the_reason_and_the_command() {
        let error =
            check(Path::new("/i/k"), Form::Compressed("gzip"), Arch::Aarch64).expect_err("compressed");
        assert!(error.contains("flat Image") && error.contains("gunzip -c < /i/k"), "{error}");
        let error =
            check(Path::new("/i/k"), Form::Compressed("zstd"), Arch::Aarch64).expect_err("compressed");
        assert!(error.contains("zstd -dc"), "{error}");
        check(Path::new("/i/k"), Form::Arm64, Arch::Aarch64).expect("flat");
    }

    #[test]
    fn the_other_architectures_kernel_is_refused_with_the_option() {
        let error = check(Path::new("k"), Form::BzImage, Arch::Aarch64).expect_err("x86");
        assert!(error.contains("--arch x86_64"), "{error}");
        let error = check(Path::new("k"), Form::Arm64, Arch::X86_64).expect_err("arm");
        assert!(error.contains("--arch aarch64"), "{error}");
    }

    #[test]
    fn what_is_not_known_is_left_to_the_machine() {
        for arch in [Arch::X86_64, Arch::Aarch64] {
            check(Path::new("k"), Form::Unknown, arch).expect("QEMU may know it");
            check(Path::new("k"), Form::Elf, arch).expect("QEMU knows ELF");
        }
    }
}
