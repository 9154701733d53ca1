//! Small CDs: a few files in one directory, as ISO 9660 (ECMA-119) with Joliet names.
//!
//! ```text
//! sector 0 … 15  16       17      18          19    20    21        22        23 …           then
//!        empty   primary  Joliet  terminator  path tables L, M of each      directories      the files
//! ```
//! Readers that know Joliet (Linux, cloud-init, Windows, macOS) see the names as they are; the others see them in capitals
//! with `;1`, which Linux undoes. Limits: [`FILES`], [`NAME`], [`CONTENT`]. Not here: subdirectories, booting, dates (the
//! same files give the same bytes).

/// Files on one CD.
pub(crate) const FILES: usize = 64;
/// Bytes of a file's name.
pub(crate) const NAME: usize = 28;
/// Bytes of all files together.
pub(crate) const CONTENT: usize = 64 << 20;

const SECTOR: usize = 2048;
/// Where the tables and directories begin.
const PATH_TABLES: u32 = 19;
const DIRECTORIES: u32 = 23;
/// 2000-01-01 00:00:00 UTC, as directory records have it (ECMA-119 §9.1.5) and as descriptors do (§8.4.26.1).
const SHORT_DATE: [u8; 7] = [100, 1, 1, 0, 0, 0, 0];
const LONG_DATE: &[u8] = b"2000010100000000\0";

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) content: Vec<u8>,
}

/// Why these files make no CD.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IsoError {
    /// More than [`FILES`].
    #[error("it has more than {FILES} files")]
    TooMany,
    /// A name that not every reader takes.
    #[error(
        "{0:?} cannot be on the CD: names have at most {NAME} letters, digits and . _ -, and differ by more than case"
    )]
    Name(String),
    /// More than [`CONTENT`].
    #[error("its files have more than {} MiB together", CONTENT >> 20)]
    TooLarge,
}

/// The CD's bytes. `label` is its volume name: `cidata`, which cloud-init looks for, or another of capitals or digits.
pub(crate) fn image(label: &str, mut files: Vec<Entry>) -> Result<Vec<u8>, IsoError> {
    if files.len() > FILES {
        return Err(IsoError::TooMany);
    }
    if files.iter().map(|file| file.content.len()).sum::<usize>() > CONTENT {
        return Err(IsoError::TooLarge);
    }
    files.sort_by_key(|file| file.name.to_ascii_uppercase());
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    for (n, file) in files.iter().enumerate() {
        let twice = n > 0 && files[n - 1].name.eq_ignore_ascii_case(&file.name);
        let name = &file.name;
        if twice || name.is_empty() || name.len() > NAME || !name.bytes().all(good) || name.starts_with('.') {
            return Err(IsoError::Name(name.clone()));
        }
    }
    // A directory's size hangs on its names alone, so both are laid out before the files have their places.
    let (plain, joliet) = (Names::Plain, Names::Joliet);
    let sizes = [plain, joliet].map(|names| directory(names, 0, 0, &files, &vec![0; files.len()]).len());
    let [first, second] = sizes.map(sectors);
    let mut next = DIRECTORIES + first + second;
    let mut places = Vec::new();
    for file in &files {
        places.push(next);
        next += sectors(file.content.len());
    }
    let mut out = vec![0; 16 * SECTOR];
    let roots = [(plain, DIRECTORIES, sizes[0]), (joliet, DIRECTORIES + first, sizes[1])];
    for (n, (names, root, size)) in roots.into_iter().enumerate() {
        let table = PATH_TABLES + if n == 0 { 0 } else { 2 };
        out.extend(descriptor(names, label, next, table, root, size));
    }
    out.extend(padded(b"\xffCD001\x01".to_vec()));
    for (_, root, _) in roots {
        out.extend(padded(path_table(&root.to_le_bytes(), &1u16.to_le_bytes())));
        out.extend(padded(path_table(&root.to_be_bytes(), &1u16.to_be_bytes())));
    }
    for (names, root, size) in roots {
        out.extend(directory(names, root, size, &files, &places));
    }
    for file in files {
        out.extend(padded(file.content));
    }
    Ok(out)
}

/// How names are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Names {
    /// Capitals, a dot, a version.
    Plain,
    /// UCS-2, big-endian, as they are.
    Joliet,
}

impl Names {
    fn encode(self, name: &str) -> Vec<u8> {
        match self {
            Self::Plain => {
                let dot = if name.contains('.') { "" } else { "." };
                format!("{}{dot};1", name.to_ascii_uppercase()).into_bytes()
            }
            Self::Joliet => name.encode_utf16().flat_map(u16::to_be_bytes).collect(),
        }
    }

    /// A field of a descriptor, filled up with spaces.
    fn field(self, text: &str, len: usize) -> Vec<u8> {
        let mut bytes = match self {
            Self::Plain => text.as_bytes().to_vec(),
            Self::Joliet => text.encode_utf16().flat_map(u16::to_be_bytes).collect(),
        };
        let space: &[u8] = if self == Self::Plain { b" " } else { b"\0 " };
        while bytes.len() < len {
            bytes.extend_from_slice(space);
        }
        bytes.truncate(len);
        bytes
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "everything together is at most CONTENT and some sectors"
)]
const fn sectors(len: usize) -> u32 {
    len.div_ceil(SECTOR) as u32
}

fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
    bytes
}

/// A number in both byte orders (ECMA-119 §7.2.3, §7.3.3).
fn both32(n: u32) -> [u8; 8] {
    let ([a, b, c, d], [e, f, g, h]) = (n.to_le_bytes(), n.to_be_bytes());
    [a, b, c, d, e, f, g, h]
}

fn both16(n: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (n.to_le_bytes(), n.to_be_bytes());
    [a, b, c, d]
}

/// A volume descriptor (ECMA-119 §8.4, §8.5).
fn descriptor(names: Names, label: &str, volume: u32, table: u32, root: u32, root_size: usize) -> Vec<u8> {
    let mut d = vec![if names == Names::Plain { 1 } else { 2 }];
    d.extend_from_slice(b"CD001\x01\0");
    d.extend(names.field("LINUX", 32));
    d.extend(names.field(label, 32));
    d.extend_from_slice(&[0; 8]);
    d.extend(both32(volume));
    // Joliet is a supplementary descriptor with this escape sequence: UCS-2 level 3.
    let mut escapes = if names == Names::Plain { Vec::new() } else { b"%/E".to_vec() };
    escapes.resize(32, 0);
    d.extend(escapes);
    d.extend([both16(1), both16(1), both16(2048)].concat());
    d.extend(both32(10));
    d.extend([table.to_le_bytes(), [0; 4], (table + 1).to_be_bytes(), [0; 4]].concat());
    d.extend(record(&[0], root, root_size, true));
    for len in [128, 128, 128, 128, 37, 37, 37] {
        d.extend(names.field("", len));
    }
    d.extend([LONG_DATE, LONG_DATE, b"0000000000000000\0".as_slice(), LONG_DATE].concat());
    d.extend_from_slice(&[1, 0]);
    padded(d)
}

/// A path table of one directory, the root (ECMA-119 §9.4).
fn path_table(root: &[u8; 4], parent: &[u8; 2]) -> Vec<u8> {
    [&[1, 0][..], root, parent, &[0, 0]].concat()
}

/// A directory record (ECMA-119 §9.1).
fn record(name: &[u8], place: u32, size: usize, is_directory: bool) -> Vec<u8> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a name has at most 2 * NAME bytes, the content CONTENT"
    )]
    let (name_len, size) = (name.len() as u8, size as u32);
    let mut r = vec![0, 0];
    r.extend(both32(place));
    r.extend(both32(size));
    r.extend(SHORT_DATE);
    r.extend([if is_directory { 2 } else { 0 }, 0, 0]);
    r.extend(both16(1));
    r.push(name_len);
    r.extend(name);
    if r.len() % 2 == 1 {
        r.push(0);
    }
    #[expect(clippy::cast_possible_truncation, reason = "33 bytes and a name of at most 2 * NAME")]
    let len = r.len() as u8;
    if let Some(first) = r.first_mut() {
        *first = len;
    }
    r
}

/// The root directory: itself, its parent (itself), the files. A record never crosses a sector.
fn directory(names: Names, root: u32, size: usize, files: &[Entry], places: &[u32]) -> Vec<u8> {
    let mut out = Vec::new();
    let own = [record(&[0], root, size, true), record(&[1], root, size, true)];
    let rest = files
        .iter()
        .zip(places)
        .map(|(file, place)| record(&names.encode(&file.name), *place, file.content.len(), false));
    for record in own.into_iter().chain(rest) {
        if out.len() % SECTOR + record.len() > SECTOR {
            out.resize(out.len().next_multiple_of(SECTOR), 0);
        }
        out.extend(record);
    }
    padded(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, content: &[u8]) -> Entry {
        Entry { name: name.into(), content: content.into() }
    }

    /// The content of a file, found as a reader of the plain tree finds it.
    fn read(image: &[u8], name: &str) -> Option<Vec<u8>> {
        let number = |bytes: &[u8], at: usize| {
            u32::from_le_bytes(*bytes[at..].first_chunk().expect("four bytes")) as usize
        };
        let root = number(image, 16 * SECTOR + 156 + 2) * SECTOR;
        let len = number(image, 16 * SECTOR + 156 + 10);
        let mut at = root;
        while at < root + len {
            let record_len = usize::from(image[at]);
            if record_len == 0 {
                at = (at + 1).next_multiple_of(SECTOR);
                continue;
            }
            let record = &image[at..at + record_len];
            if &record[33..33 + usize::from(record[32])] == name.as_bytes() {
                let (place, len) = (number(record, 2) * SECTOR, number(record, 10));
                return Some(image[place..place + len].to_vec());
            }
            at += record_len;
        }
        None
    }

    #[test]
    fn files_are_found_by_a_reader_and_lie_on_sectors() {
        let image = image("config", vec![file("user-data", b"u"), file("config", &[7; 5000])]).expect("a CD");
        assert_eq!(image.len() % SECTOR, 0);
        assert_eq!(read(&image, "CONFIG.;1"), Some(vec![7; 5000]));
        assert_eq!(read(&image, "USER-DATA.;1"), Some(b"u".to_vec()));
        assert_eq!(read(&image, "GONE.;1"), None);
        assert_eq!(&image[16 * SECTOR + 40..16 * SECTOR + 46], b"config");
        let volume = u32::from_le_bytes(*image[16 * SECTOR + 80..].first_chunk().expect("a size"));
        assert_eq!(volume as usize * SECTOR, image.len());
    }

    #[test]
    fn many_files_fill_more_than_one_sector_of_the_directory() {
        let files: Vec<Entry> =
            (0..FILES).map(|n| file(&format!("a-file-with-a-long-name-{n}"), &[1])).collect();
        let made = image("cidata", files.clone()).expect("a CD");
        for entry in &files {
            let name = format!("{}.;1", entry.name.to_ascii_uppercase());
            assert_eq!(read(&made, &name), Some(vec![1]), "{name}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for name in ["", "a/b", "a b", ".hidden", "ü", &"x".repeat(NAME + 1)] {
            assert_eq!(image("c", vec![file(name, b"")]), Err(IsoError::Name(name.into())), "{name:?}");
        }
        assert_eq!(image("c", vec![file("a", b""), file("A", b"")]), Err(IsoError::Name("A".into())));
        let many = (0..=FILES).map(|n| file(&n.to_string(), b"")).collect();
        assert_eq!(image("c", many), Err(IsoError::TooMany));
        assert_eq!(image("c", vec![file("a", &vec![0; CONTENT + 1])]), Err(IsoError::TooLarge));
    }

    #[test]
    fn a_reader_of_another_make_agrees() {
        let Some(xorriso) = crate::programs::in_path("xorriso") else {
            eprintln!("SKIPPED: no xorriso in PATH (tests/setup.sh installs it)");
            return;
        };
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (path, to) = (dir.path().join("cd.iso"), dir.path().join("out"));
        let bytes = image("cidata", vec![file("user-data", b"#cloud-config\n"), file("Config", &[3; 4097])]);
        std::fs::write(&path, bytes.expect("a CD")).expect("writing");
        let out = std::process::Command::new(xorriso)
            .args(["-osirrox", "on", "-read_fs", "norock", "-indev"])
            .arg(&path)
            .args(["-extract", "/"])
            .arg(&to)
            .output()
            .expect("it runs");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}");
        assert!(said.contains("Volume id    : 'cidata'"), "{said}");
        assert_eq!(std::fs::read(to.join("user-data")).expect(&said), b"#cloud-config\n");
        assert_eq!(std::fs::read(to.join("Config")).expect(&said), [3; 4097]);
    }
}
