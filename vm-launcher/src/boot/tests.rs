//! What is booted, by the files that are there.

use super::media::tests::iso;
use super::*;

struct Files(tempfile::TempDir);

impl Files {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (name, bytes) in files {
            fs::write(dir.path().join(name), bytes).expect("a file in it");
        }
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn resolve(&self, image: &BootImage, uefi: bool) -> Result<Found, LaunchError> {
        Asked { image, arch: Arch::X86_64, uefi, own_firmware: false, firmware: None }.resolve()
    }

    fn found(&self, name: &str) -> Found {
        self.resolve(&BootImage::Prefix(self.path(name)), false).expect("something to boot")
    }

    fn refused(&self, name: &str) -> String {
        self.resolve(&BootImage::Prefix(self.path(name)), false).expect_err("nothing to boot").to_string()
    }
}

const QCOW2: &[u8] = b"QFI\xfb\0\0\0\x03";

#[test]
fn a_prefix_finds_linuxkits_three_files() {
    let files = Files::new(&[
        ("my.os-kernel", b"k"),
        ("my.os-initrd.img", b"i"),
        ("my.os-cmdline", b"console=ttyS0\n"),
    ]);
    let expected = Boot::Kernel {
        kernel: files.path("my.os-kernel"),
        initrd: Some(files.path("my.os-initrd.img")),
        cmdline: "console=ttyS0".into(),
        root: None,
    };
    assert_eq!(files.found("my.os"), plain(expected));
}

#[test]
fn the_initrd_and_the_command_line_may_be_absent() {
    let files = Files::new(&[("os-kernel", b"k")]);
    let expected =
        Boot::Kernel { kernel: files.path("os-kernel"), initrd: None, cmdline: String::new(), root: None };
    assert_eq!(files.found("os").boot, expected);
}

#[test]
fn a_missing_or_empty_kernel_is_named_with_what_to_do() {
    let error = Files::new(&[]).refused("my.os");
    assert!(error.contains("my.os-kernel") && error.contains("linuxkit build"), "{error}");
    let error = Files::new(&[("my.os-kernel", b"")]).refused("my.os");
    assert!(error.contains("it is empty"), "{error}");
}

#[test]
fn an_initrd_that_is_named_must_be_there() {
    let files = Files::new(&[("k", b"k")]);
    let image = BootImage::Files {
        kernel: files.path("k"),
        initrd: Some(files.path("gone")),
        cmdline: String::new(),
    };
    let error = files.resolve(&image, false).expect_err("it is gone");
    assert!(error.to_string().contains("initrd"), "{error}");
    assert_eq!(error.exit_code(), 1);
}

#[test]
fn a_kernel_with_a_squashfs_and_no_initrd_has_its_root_on_the_first_disk() {
    let files = Files::new(&[("os-kernel", b"k"), ("os-squashfs.img", b"s"), ("os-cmdline", b"quiet")]);
    let Boot::Kernel { root, cmdline, initrd, .. } = files.found("os").boot else { panic!("a kernel") };
    assert_eq!((root, initrd), (Some(files.path("os-squashfs.img")), None));
    assert_eq!(cmdline, "quiet root=/dev/vda ro");
}

#[test]
fn a_command_line_that_names_a_root_keeps_it() {
    let files =
        Files::new(&[("os-kernel", b"k"), ("os-squashfs.img", b"s"), ("os-cmdline", b"root=LABEL=x")]);
    let image = BootImage::Squashfs { prefix: files.path("os"), initrd: None };
    let Boot::Kernel { cmdline, .. } = files.resolve(&image, false).expect("it boots").boot else { panic!() };
    assert_eq!(cmdline, "root=LABEL=x");
}

#[test]
fn an_initrd_wins_over_a_squashfs_and_the_note_says_how_to_get_the_other() {
    let files = Files::new(&[("os-kernel", b"k"), ("os-initrd.img", b"i"), ("os-squashfs.img", b"s")]);
    let found = files.found("os");
    assert!(matches!(found.boot, Boot::Kernel { root: None, .. }));
    assert!(found.note.expect("a note").contains("--squashfs"));
}

#[test]
fn a_file_is_what_its_content_says() {
    let files = Files::new(&[("a", &iso(&[0])), ("b", QCOW2)]);
    let boot = Boot::Cd { iso: files.path("a"), firmware: Firmware::Default };
    assert_eq!(files.found("a"), plain(boot));
    let boot = Boot::Disk { disk: files.path("b"), format: Format::Qcow2, firmware: Firmware::Default };
    assert_eq!(files.found("b"), plain(boot));
}

#[test]
fn a_prefix_finds_its_only_image_and_a_kernel_wins_over_one() {
    let files = Files::new(&[("os.qcow2", QCOW2)]);
    assert!(matches!(files.found("os").boot, Boot::Disk { format: Format::Qcow2, .. }));
    let files = Files::new(&[("os-kernel", b"k"), ("os.iso", &iso(&[0]))]);
    let found = files.found("os");
    assert!(matches!(found.boot, Boot::Kernel { .. }));
    assert!(found.note.expect("a note").contains("os.iso"));
}

#[test]
fn what_may_be_two_things_is_an_error_that_names_both() {
    let files = Files::new(&[("os.qcow2", QCOW2), ("os.iso", &iso(&[0]))]);
    let error = files.refused("os");
    assert!(
        error.contains("os.qcow2") && error.contains("os.iso") && error.contains("name the file"),
        "{error}"
    );
    let files = Files::new(&[("os", QCOW2), ("os-kernel", b"k")]);
    let error = files.refused("os");
    assert!(error.contains("ambiguous") && error.contains("--kernel"), "{error}");
}

#[test]
fn what_cannot_be_booted_says_what_it_is_and_what_to_do() {
    let mut kernel = vec![0; 1024];
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    let files = Files::new(&[("vmdk", b"KDMV"), ("kernel", &kernel), ("text", b"hello")]);
    for (name, words) in [("vmdk", "qemu-img convert"), ("kernel", "--kernel"), ("text", "neither an ISO")] {
        let error = files.refused(name);
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn iso_takes_the_file_for_the_firmware_that_is_asked_for() {
    let files = Files::new(&[("os.iso", &iso(&[0])), ("text", b"hello")]);
    let found = files.resolve(&BootImage::Iso(files.path("os")), false).expect("a CD");
    assert_eq!(found.boot, Boot::Cd { iso: files.path("os.iso"), firmware: Firmware::Default });
    let error =
        files.resolve(&BootImage::Iso(files.path("text")), false).expect_err("it is text").to_string();
    assert!(error.contains("not an ISO 9660"), "{error}");
}

#[test]
fn uefi_needs_something_that_firmware_starts() {
    let files = Files::new(&[("os-kernel", b"k")]);
    let error = files.resolve(&BootImage::Prefix(files.path("os")), true).expect_err("a kernel").to_string();
    assert!(error.contains("--uefi"), "{error}");
}

#[test]
fn a_medium_for_uefi_alone_gets_it_and_the_note_says_why() {
    let files = Files::new(&[("os.iso", &iso(&[0xef])), ("OVMF.fd", b"f")]);
    let image = BootImage::Prefix(files.path("os.iso"));
    let firmware = files.path("OVMF.fd");
    let asked = Asked {
        image: &image,
        arch: Arch::X86_64,
        uefi: false,
        own_firmware: false,
        firmware: Some(&firmware),
    };
    let found = asked.resolve().expect("a CD");
    assert_eq!(
        found.boot,
        Boot::Cd { iso: files.path("os.iso"), firmware: Firmware::Single(firmware.clone()) }
    );
    assert!(found.note.expect("a note").contains("boots by nothing else"));
}
