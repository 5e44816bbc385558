//! exp, the logistic function, tanh and the normal distribution function, in f32. NaN in gives NaN out.
//!
//! The polynomials are minimax fits of the stated functions (Remez exchange at 30 digits).

use super::simd::Simd;

/// `c[0] + c[1] x + c[2] x^2 + ...`
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::Vector, c: [f32; N]) -> S::Vector {
    let mut sum = s.splat(c[N - 1]);
    for i in (0..N - 1).rev() {
        sum = s.fma(sum, x, s.splat(c[i]));
    }
    sum
}

/// `e^x`, with subnormal results, 0 below them and infinity above the largest number.
///
/// `x = n ln 2 + r`, `e^x = 2^n (1 + r + r^2 q(r))`, q fitted to `(e^r - 1 - r) / r^2` for the smallest relative error
/// of `e^r` on `|r| <= ln(2)/2`.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::Vector) -> S::Vector {
    // Adding it rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the product of the first with any n here is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const Q: [f32; 5] = [0.499_999_93, 0.166_665_2, 0.041_668_39, 0.008_368_745, 0.001_381_455_4];

    let x = s.max(s.splat(-105.0), s.min(s.splat(89.0), x));
    let n = s.sub(s.fma(x, s.splat(std::f32::consts::LOG2_E), s.splat(ROUND)), s.splat(ROUND));
    let r = s.fma(n, s.splat(-LN2_HIGH), x);
    let r = s.fma(n, s.splat(-LN2_LOW), r);
    let q = polynomial(s, r, Q);
    let e = s.add(s.fma(s.mul(r, r), q, r), s.splat(1.0));
    s.scale_by_power(e, n)
}

/// `1 / (1 + e^-x)`, from `e^-|x|`, which never overflows; accurate down to the subnormal numbers.
#[inline(always)]
pub(super) fn sigmoid<S: Simd>(s: S, x: S::Vector) -> S::Vector {
    let one = s.splat(1.0);
    let e = exp(s, s.sub(s.splat(0.0), s.abs(x)));
    s.div(s.if_negative(x, e, one), s.add(one, e))
}

/// The hyperbolic tangent: `x (1 + x^2 p(x^2))` up to 0.625, p fitted for the smallest relative error, and
/// `1 - 2 / (e^2x + 1)` beyond.
#[inline(always)]
pub(super) fn tanh<S: Simd>(s: S, x: S::Vector) -> S::Vector {
    const P: [f32; 5] = [-0.333_332_8, 0.133_314_42, -0.053_739_716, 0.020_639_09, -0.005_704_988_7];
    const SERIES: f32 = 0.625;

    let (one, size) = (s.splat(1.0), s.abs(x));
    let square = s.mul(x, x);
    let near = s.fma(s.mul(x, square), polynomial(s, square, P), x);
    let far = s.sub(one, s.div(s.splat(2.0), s.add(exp(s, s.add(size, size)), one)));
    let far = s.if_negative(x, s.sub(s.splat(0.0), far), far);
    s.if_negative(s.sub(size, s.splat(SERIES)), near, far)
}

/// The standard normal distribution function `(1 + erf(x / sqrt 2)) / 2`, accurate in the lower tail too.
///
/// For `x <= 0` it is `e^(-x^2/2) t p(t)` with `t = 4 / (4 + |x|)`, p fitted for the smallest relative error on
/// `|x| <= 15`; for `x > 0` one minus that. (The form is that of Shepherd and Laframboise, Math. Comp. 36, 1981.)
#[inline(always)]
pub(super) fn normal<S: Simd>(s: S, x: S::Vector) -> S::Vector {
    const P: [f32; 10] = [
        0.099_744_99,
        0.099_546_33,
        0.095_089_73,
        0.073_902_07,
        0.081_369_2,
        0.022_209_976,
        0.017_388_323,
        0.059_690_55,
        -0.066_118_17,
        0.017_177_004,
    ];
    let z = s.min(s.splat(15.0), s.abs(x));
    let t = s.div(s.splat(4.0), s.add(s.splat(4.0), z));
    let square = s.mul(z, z);
    // What rounding z^2 lost matters in the exponent.
    let lost = s.fma(z, z, s.sub(s.splat(0.0), square));
    let e = exp(s, s.mul(s.splat(-0.5), square));
    let e = s.fma(e, s.mul(s.splat(-0.5), lost), e);
    let tail = s.mul(s.mul(e, t), polynomial(s, t, P));
    s.if_negative(x, tail, s.sub(s.splat(1.0), tail))
}
