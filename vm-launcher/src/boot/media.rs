//! What a disk or CD image is, by its content: names lie, and a wrong format corrupts.
//!
//! ISO 9660 (ECMA-119 §8.1) with the boot catalog of El Torito 1.0; qcow2 and other formats by their magic
//! (QEMU docs/interop); raw disks by the boot record's mark and the GPT (UEFI 2.10 §5).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use crate::disk::Format;

/// Bytes of a CD's sector.
const SECTOR: u64 = 2048;
/// The partition type of an EFI system partition, as it lies on disk.
const ESP: [u8; 16] =
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];
/// Boot code of an MBR: what lies before the disk's signature.
const BOOT_CODE: usize = 440;

/// What a medium is, as far as booting goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Medium {
    /// A CD.
    Iso(Entrance),
    /// A disk.
    Disk(Format, Entrance),
    /// A disk in a format that is not taken: its name.
    Foreign(&'static str),
    /// A kernel.
    Kernel,
    /// None of these.
    Unknown,
}

/// Which firmware a medium is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entrance {
    /// BIOS, or both.
    Bios,
    /// UEFI and nothing else.
    UefiOnly,
    /// Its content does not say.
    Unknown,
}

/// Looks at a file.
pub(super) fn look(path: &Path) -> io::Result<Medium> {
    let mut file = File::open(path)?;
    let head = at(&mut file, 0, 4096)?;
    let cd = at(&mut file, 16 * SECTOR, 2 * SECTOR)?;
    if cd.get(1..6) == Some(b"CD001") {
        return Ok(Medium::Iso(iso_entrance(&mut file, &cd)?));
    }
    const FOREIGN: [(&[u8], &str); 5] = [
        (b"KDMV", "VMDK"),
        (b"vhdxfile", "VHDX"),
        (b"conectix", "VHD"),
        (b"QED\0", "QED"),
        (b"# Disk DescriptorFile", "VMDK"),
    ];
    if head.starts_with(b"QFI\xfb") {
        return Ok(Medium::Disk(Format::Qcow2, Entrance::Unknown));
    }
    if let Some((_, name)) = FOREIGN.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Ok(Medium::Foreign(name));
    }
    use super::kernel::Form;
    match super::kernel::form(&head) {
        // A bzImage has the boot record's mark too, so it is asked for first.
        Form::BzImage | Form::Arm64 | Form::Zboot | Form::Elf => return Ok(Medium::Kernel),
        Form::Compressed(_) | Form::Unknown => {}
    }
    if head.get(510..512) == Some(b"\x55\xaa") {
        return Ok(Medium::Disk(Format::Raw, disk_entrance(&mut file, &head)?));
    }
    Ok(Medium::Unknown)
}

/// Up to `len` bytes from `offset`; fewer, or none, at the end of the file.
fn at(file: &mut File, offset: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(offset))?;
    file.take(len).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// El Torito §2: sector 17 names the catalog; its validation entry has the first platform, section headers have others.
fn iso_entrance(file: &mut File, descriptors: &[u8]) -> io::Result<Entrance> {
    const EFI: u8 = 0xef;
    let record = descriptors.get(2048..).unwrap_or_default();
    let is_boot = record.get(7..30) == Some(b"EL TORITO SPECIFICATION");
    let Some(&[a, b, c, d]) = record.get(71..).and_then(<[u8]>::first_chunk).filter(|_| is_boot) else {
        return Ok(Entrance::Unknown);
    };
    let catalog = at(file, u64::from(u32::from_le_bytes([a, b, c, d])) * SECTOR, SECTOR)?;
    let mut platforms = Vec::new();
    for entry in catalog.chunks_exact(32) {
        match entry {
            // The validation entry, and headers of sections (0x91 is the last).
            [1, platform, ..] if platforms.is_empty() => platforms.push(*platform),
            [0x90 | 0x91, platform, ..] => platforms.push(*platform),
            _ => {}
        }
    }
    Ok(match platforms.as_slice() {
        [] => Entrance::Unknown,
        all if all.iter().all(|platform| *platform == EFI) => Entrance::UefiOnly,
        _ => Entrance::Bios,
    })
}

/// A disk with an EFI system partition and no boot code in its first sector is for UEFI alone.
fn disk_entrance(file: &mut File, head: &[u8]) -> io::Result<Entrance> {
    let boots_by_bios = head.iter().take(BOOT_CODE).any(|byte| *byte != 0);
    if boots_by_bios || head.get(512..520) != Some(b"EFI PART") {
        return Ok(if boots_by_bios { Entrance::Bios } else { Entrance::Unknown });
    }
    // 128 entries of 128 bytes, from the third sector on (UEFI 2.10 §5.3.2).
    let entries = at(file, 1024, 128 * 128)?;
    let esp = entries.chunks_exact(128).any(|entry| entry.starts_with(&ESP));
    Ok(if esp { Entrance::UefiOnly } else { Entrance::Unknown })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::fs;

    /// A CD with a boot catalog that has these platforms.
    pub(crate) fn iso(platforms: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 20 * 2048];
        bytes[16 * 2048] = 1;
        bytes[16 * 2048 + 1..16 * 2048 + 6].copy_from_slice(b"CD001");
        bytes[17 * 2048 + 1..17 * 2048 + 6].copy_from_slice(b"CD001");
        bytes[17 * 2048 + 7..17 * 2048 + 30].copy_from_slice(b"EL TORITO SPECIFICATION");
        bytes[17 * 2048 + 71] = 19;
        for (n, platform) in platforms.iter().enumerate() {
            let entry = 19 * 2048 + if n == 0 { 0 } else { 32 + n * 32 };
            bytes[entry] = if n == 0 { 1 } else { 0x91 };
            bytes[entry + 1] = *platform;
        }
        bytes
    }

    fn medium(bytes: &[u8]) -> Medium {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        fs::write(file.path(), bytes).expect("writing");
        look(file.path()).expect("it can be read")
    }

    #[test]
    fn a_cd_says_for_which_firmware_it_is() {
        assert_eq!(medium(&iso(&[0])), Medium::Iso(Entrance::Bios));
        assert_eq!(medium(&iso(&[0, 0xef])), Medium::Iso(Entrance::Bios));
        assert_eq!(medium(&iso(&[0xef])), Medium::Iso(Entrance::UefiOnly));
    }

    #[test]
    fn a_disk_with_only_an_efi_partition_is_for_uefi() {
        let mut disk = vec![0; 64 * 1024];
        disk[510..512].copy_from_slice(b"\x55\xaa");
        assert_eq!(medium(&disk), Medium::Disk(Format::Raw, Entrance::Unknown));
        disk[512..520].copy_from_slice(b"EFI PART");
        disk[1024..1040].copy_from_slice(&ESP);
        assert_eq!(medium(&disk), Medium::Disk(Format::Raw, Entrance::UefiOnly));
        disk[0] = 0xeb;
        assert_eq!(medium(&disk), Medium::Disk(Format::Raw, Entrance::Bios));
    }

    #[test]
    fn formats_are_known_by_their_magic() {
        assert_eq!(medium(b"QFI\xfb\0\0\0\x03"), Medium::Disk(Format::Qcow2, Entrance::Unknown));
        assert_eq!(medium(b"KDMV"), Medium::Foreign("VMDK"));
        assert_eq!(medium(b"hello"), Medium::Unknown);
        assert_eq!(medium(b""), Medium::Unknown);
        let mut kernel = vec![0; 1024];
        kernel[0x1fe..0x206].copy_from_slice(b"\x55\xaa\x00\x00HdrS");
        assert_eq!(medium(&kernel), Medium::Kernel);
    }
}
