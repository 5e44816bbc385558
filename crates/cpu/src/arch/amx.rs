//! AMX: products of tiles of bf16, for panels.
//!
//! ```text
//! for each panel
//!     for tiles of up to 32 rows, of nearly equal size
//!         c = sums                                       16 rows x 16 outputs a register, two or four of them
//!         for every 16 lines of the panel
//!             c += x[rows][16 pairs] . lines[16 pairs][outputs]
//!         sums = c
//! ```
//!
//! Constraint: a product of tiles first adds up its 16 pairs and then adds that to the sum. So the bits of a sum depend on
//! the matrix row, the row of x and which pairs are in one product alone: calls are cut at multiples of 16 lines, and what
//! is missing of the last 16 counts as zeros.
//!
//! Lines lie in a panel as the second operand wants them. Instructions are asm, since Rust has no stable names for them.
//! The compiler uses no tile registers; between [`Tiles`] and its end their shapes are this module's.

use super::panel::{PANEL, PanelGroup, PanelSums};
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, CpuidResult};
use std::sync::OnceLock;

/// Rows of a register, and lines of a panel that one product takes.
const TILE: usize = 16;
/// Bytes of a panel that are asked for ahead of what is multiplied.
const AHEAD: usize = 4096;
const LINE: usize = 64;
/// Bytes of a register's row.
const ROW_BYTES: usize = 64;
/// Bytes of a line of a panel: the distance of a register's rows.
const LINE_BYTES: usize = PANEL * 2 * size_of::<bf16>();

/// Whether the CPU has tiles of bf16, and the system lets this process use them, which is asked of it once.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_tiles() && system_saves_tiles() && permitted())
}

/// What the CPU says of itself.
#[allow(unused_unsafe, reason = "unsafe in the oldest Rust that this crate builds with")]
fn cpuid(leaf: u32, part: u32) -> CpuidResult {
    // SAFETY: every 64-bit processor has the instruction.
    unsafe { __cpuid_count(leaf, part) }
}

/// Whether the CPU has eight registers of 16 rows of 64 bytes, and products of bf16.
fn has_tiles() -> bool {
    const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
    const PALETTE: u32 = 0x1d;
    if cpuid(0, 0).eax < PALETTE || cpuid(7, 0).edx & BF16_AND_TILES != BF16_AND_TILES {
        return false;
    }
    let palette = cpuid(PALETTE, 1);
    palette.ebx == 8 << 16 | ROW_BYTES as u32 && palette.ecx & 0xffff == TILE as u32
}

/// Whether the system keeps tiles and their shapes when it changes threads.
fn system_saves_tiles() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const TILES: u32 = 1 << 17 | 1 << 18;
    if cpuid(1, 0).ecx & OSXSAVE == 0 {
        return false;
    }
    let states: u32;
    // SAFETY: the CPU has the instruction, as was just seen; it reads a register that every program may read.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") states, out("edx") _, options(nomem, nostack, preserves_flags)) };
    states & TILES == TILES
}

/// Asks Linux for the permission to use tiles, for all threads of the process.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const TILE_DATA: u64 = 18;
    let result: i64;
    // SAFETY: the call takes two numbers and touches no memory of this process; the kernel changes rax, rcx and r11 alone.
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") TILE_DATA,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result == 0
}

/// How other systems are asked is not known here.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// What `ldtilecfg` reads: of each register the bytes of a row, and the rows.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    first_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The registers in shape for so many rows of x, until it is dropped.
struct Tiles {
    rows: usize,
}

impl Tiles {
    /// 0 to 3 have sums, 4 and 5 rows of x, 6 and 7 lines of a panel.
    ///
    /// # Safety
    /// [`is_available`] said so; 1 <= rows <= 2 * TILE.
    unsafe fn shape(&mut self, rows: usize) {
        if self.rows == rows {
            return;
        }
        let (upper, lower) = (rows.min(TILE) as u8, rows.saturating_sub(TILE) as u8);
        let line = TILE as u8;
        let mut shapes = Shapes { palette: 1, first_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (i, rows) in [upper, upper, lower, lower, upper, lower, line, line].into_iter().enumerate() {
            (shapes.rows[i], shapes.row_bytes[i]) = (rows, if rows > 0 { ROW_BYTES as u16 } else { 0 });
        }
        // SAFETY: the CPU has the instruction and the process may use it, as the caller vouches; it reads the 64 bytes of
        // `shapes`, which say what palette 1 allows.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, preserves_flags, readonly)) };
        self.rows = rows;
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        if self.rows > 0 {
            // SAFETY: registers were in shape, so the CPU has the instruction; a caller keeps no tiles across a call.
            unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
        }
    }
}

/// Rows of a panel's sums, one after another.
const SUMS_BYTES: usize = size_of::<PanelSums>();
/// Bytes of the lines that a product takes.
const PRODUCT_BYTES: usize = TILE * LINE_BYTES;

/// A panel, or lines of it, and what it is multiplied with.
#[derive(Clone, Copy)]
struct At {
    lines: *const bf16,
    /// Tiles of x: 16 pairs of each of the rows.
    x: *const Row,
    /// Bytes from a tile of x to that of the next 16 pairs.
    step: usize,
    /// Where the first row's sums of the panel's halves lie.
    sums: [*mut f32; 2],
    /// How many products of 16 lines.
    products: usize,
    /// What is asked for meanwhile.
    ahead: *const u8,
}

/// A row of a register: pairs.
type Row = [u32; TILE];

macro_rules! ask {
    ($($line:literal)*) => { concat!($("prefetcht1 [{ahead} + ", $line, " * 64]\n",)* "") };
}

/// The products of up to 16 rows (`$upper`) and of 17 to 32 (`$both`), each of which asks for so many lines ahead.
///
/// # Safety
/// `Tiles` exist for as many rows; there is a product; `at.products` tiles of x are readable, `at.step` apart, and as many times 16 lines of the
/// panel; sums of all rows are writable, `SUMS_BYTES` apart, 16 at each of `at.sums`.
macro_rules! kernels {
    ($upper:ident $both:ident $lines:literal [$($first:literal)*] [$($second:literal)*]) => {
        unsafe fn $upper(at: At) {
            // SAFETY: as the caller vouches; what is ahead is only asked for.
            unsafe {
                asm!(
                    "tileloadd tmm0, [{gate} + {sums}]",
                    "tileloadd tmm1, [{up} + {sums}]",
                    "2:",
                    "tileloadd tmm4, [{x} + {row}]",
                    "tileloadd tmm6, [{lines} + {line}]",
                    ask!($($first)*),
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{lines} + {line} + 64]",
                    ask!($($second)*),
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {x}, {step}",
                    "add {lines}, {product}",
                    "add {ahead}, {asked}",
                    "dec {left}",
                    "jnz 2b",
                    "tilestored [{gate} + {sums}], tmm0",
                    "tilestored [{up} + {sums}], tmm1",
                    gate = in(reg) at.sums[0], up = in(reg) at.sums[1], sums = in(reg) SUMS_BYTES,
                    x = inout(reg) at.x => _, row = in(reg) ROW_BYTES, step = in(reg) at.step,
                    lines = inout(reg) at.lines => _, line = in(reg) LINE_BYTES, product = const PRODUCT_BYTES,
                    ahead = inout(reg) at.ahead => _, asked = const $lines * 64, left = inout(reg) at.products => _,
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }

        unsafe fn $both(at: At) {
            // SAFETY: as the caller vouches; what is ahead is only asked for.
            unsafe {
                asm!(
                    "tileloadd tmm0, [{gate} + {sums}]",
                    "tileloadd tmm1, [{up} + {sums}]",
                    "tileloadd tmm2, [{gate} + {sums} + {half}]",
                    "tileloadd tmm3, [{up} + {sums} + {half}]",
                    "2:",
                    "tileloadd tmm6, [{lines} + {line}]",
                    "tileloadd tmm4, [{x} + {row}]",
                    ask!($($first)*),
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{lines} + {line} + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{x} + {row} + {tile}]",
                    ask!($($second)*),
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {x}, {step}",
                    "add {lines}, {product}",
                    "add {ahead}, {asked}",
                    "dec {left}",
                    "jnz 2b",
                    "tilestored [{gate} + {sums}], tmm0",
                    "tilestored [{up} + {sums}], tmm1",
                    "tilestored [{gate} + {sums} + {half}], tmm2",
                    "tilestored [{up} + {sums} + {half}], tmm3",
                    gate = in(reg) at.sums[0], up = in(reg) at.sums[1], sums = in(reg) SUMS_BYTES,
                    half = const TILE * SUMS_BYTES,
                    x = inout(reg) at.x => _, row = in(reg) ROW_BYTES, tile = const TILE * ROW_BYTES, step = in(reg) at.step,
                    lines = inout(reg) at.lines => _, line = in(reg) LINE_BYTES, product = const PRODUCT_BYTES,
                    ahead = inout(reg) at.ahead => _, asked = const $lines * 64, left = inout(reg) at.products => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
                    out("tmm6") _, out("tmm7") _, options(nostack),
                );
            }
        }
    };
}

kernels!(upper_16 both_16 16 [0 1 2 3 4 5 6 7] [8 9 10 11 12 13 14 15]);
kernels!(upper_32 both_32 32
    [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15] [16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31]);

/// A panel times rows that registers are in shape for; each product asks for so many lines ahead: 32 or 16.
///
/// # Safety
/// As for the kernels, of `steps` pairs and lines; `Tiles` are for `count` rows.
unsafe fn tile(at: At, steps: usize, count: usize, asked: usize) {
    let run = |at: At| {
        let kernel = match (asked, count > TILE) {
            (32.., false) => upper_32,
            (32.., true) => both_32,
            (_, false) => upper_16,
            (_, true) => both_16,
        };
        if at.products > 0 {
            // SAFETY: as the caller vouches, and there is a product.
            unsafe { kernel(at) };
        }
    };
    run(at);
    let rest = steps % TILE;
    if rest > 0 {
        let mut lines = [[bf16::ZERO; 2 * PANEL]; TILE];
        for (k, line) in lines.iter_mut().enumerate().take(rest) {
            // SAFETY: the panel has `steps` lines.
            *line = unsafe { at.lines.cast::<[bf16; 2 * PANEL]>().add(at.products * TILE + k).read() };
        }
        run(At { lines: lines.as_ptr().cast(), x: at.x.wrapping_byte_add(at.products * at.step), products: 1, ..at });
    }
}

/// `sums += x . panel` for each panel and row; x in tiles.
///
/// # Safety
/// [`is_available`] said so.
pub(super) unsafe fn panels(group: PanelGroup<'_, bf16>) {
    if !group.fits() {
        return;
    }
    let PanelGroup { weights, next, x, sums, columns, width, .. } = group;
    let rows = sums.len();
    let x = x.as_chunks::<TILE>().0;
    let lines = weights.iter().map(|panel| panel.len() / (2 * PANEL)).min().unwrap_or(0);
    let steps = lines.min(x.len() / rows * TILE);
    let (x, sums, products) = (x.as_ptr(), sums.as_mut_ptr(), steps / TILE);
    // One tile of rows asks for lines of its own, and several for a part of the next panel each, so that memory never rests.
    let tiles = rows.div_ceil(2 * TILE);
    let asked = if tiles == 1 { 32 } else { 16 };
    let mut shapes = Tiles { rows: 0 };
    for (p, panel) in weights.iter().enumerate() {
        let lines = panel.as_ptr();
        let next = weights.get(p + 1).or(next.first()).filter(|next| !next.is_empty());
        let next = next.map_or(lines, |next| next.as_ptr());
        for tile in 0..tiles {
            // There and back, since a change of shapes takes as long as some products.
            let place = if p % 2 == 0 { tile } else { tiles - 1 - tile };
            let [first, end] = [place, place + 1].map(|place| rows * place / tiles);
            // SAFETY: as the caller vouches; there are no more rows than tiles of 2 * TILE have, and no fewer than tiles.
            unsafe { shapes.shape(end - first) };
            let ahead = match tiles {
                1 => lines.wrapping_byte_add(AHEAD),
                _ if tile * asked < PRODUCT_BYTES / LINE => next.wrapping_byte_add(tile * products * asked * LINE),
                _ => lines,
            };
            let at = At {
                lines,
                x: x.wrapping_add(first),
                step: rows * ROW_BYTES,
                sums: columns.map(|column| sums.wrapping_add(first).cast::<f32>().wrapping_add(column + p * width)),
                products,
                ahead: ahead.cast(),
            };
            // SAFETY: every panel and every row has so many steps, tiles of x are whole, and half a panel's sums lie from
            // each column on, as `fits` says; registers are in shape for these rows.
            unsafe { self::tile(at, steps, end - first, asked) };
        }
    }
}

/// Products of registers alone, `rounds` for each of the four that have sums; returns how many multiply-adds they were.
///
/// # Safety
/// [`is_available`] said so.
pub(super) unsafe fn multiply_adds(rounds: usize) -> usize {
    const OF_A_ROUND: usize = 4 * TILE * TILE * 2 * TILE;
    if rounds > 0 {
        let mut tiles = Tiles { rows: 0 };
        // SAFETY: as the caller vouches.
        unsafe { tiles.shape(2 * TILE) };
        // SAFETY: the registers are in shape.
        unsafe {
            asm!(
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {left}",
                "jnz 2b",
                left = inout(reg) rounds => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, options(nomem, nostack),
            );
        }
    }
    rounds * OF_A_ROUND
}
