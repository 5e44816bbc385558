// Functions of f32 that WGSL lacks or leaves to the device: its own exp may be off by 3 + 2 |x| units of the last place, and
// what is made with it likewise. These are made of sums, products, quotients (which WGSL wants within 2.5 units) and roots.
// What is said of their errors is so where the compiler keeps the order of operations, which Metal's fast math need not.
// Where a sum follows a product, fma says so: else a driver may round once in one kernel and twice in another.

fn sigmoid(x: f32) -> f32 {
    let e = exponential(-abs(x));
    return select(1.0, e, x < 0.0) / (1.0 + e);
}

// Complementary error function. For x >= 0 the formula (Press et al., Numerical Recipes, 6.2) is within 1.2e-7 of itself;
// the rounding of its exponent adds up to 2e-7 (1 + x^2).
fn erfc(x: f32) -> f32 {
    let z = abs(x);
    let t = 1.0 / fma(0.5, z, 1.0);
    var s = 0.17087277;
    s = fma(t, s, -0.82215223);
    s = fma(t, s, 1.48851587);
    s = fma(t, s, -1.13520398);
    s = fma(t, s, 0.27886807);
    s = fma(t, s, -0.18628806);
    s = fma(t, s, 0.09678418);
    s = fma(t, s, 0.37409196);
    s = fma(t, s, 1.00002368);
    let e = exponential(fma(t, s, fma(-z, z, -1.26551223)));
    return select(t * e, fma(-t, e, 2.0), x < 0.0);
}

// 1 / sqrt(x) within 1.5 ulp: a step of Newton's after the device's own.
fn inverse_root(x: f32) -> f32 {
    let r = 1.0 / sqrt(x);
    let error = fma(-x * r, r, 1.0);
    return select(r, fma(0.5 * r, error, r), abs(error) < 0.5);
}

// Near zero a quotient of polynomials (the continued fraction of tanh after seven terms), which keeps the digits there.
fn tanh_of(x: f32) -> f32 {
    if (abs(x) < 1.0) {
        let y = x * x;
        let above = fma(fma(fma(x, x, 378.0), y, 17325.0), y, 135135.0);
        let below = fma(fma(fma(28.0, y, 3150.0), y, 62370.0), y, 135135.0);
        return x * above / below;
    }
    let e = exponential(-2.0 * abs(x));
    let y = (1.0 - e) / (1.0 + e);
    return select(y, -y, x < 0.0);
}

// exp, within two units of the last place; numbers below 2^-126 may become zero. Infinities are numbers like any other.
fn exponential(x: f32) -> f32 {
    if (x < -104.0) { return 0.0; }
    let y = select(x, 100.0, x > 100.0);
    let n = round(y * 1.4426950408889634);
    // ln 2 in two parts, of which n times the first is exact
    let r = fma(n, 2.12194440e-4, fma(n, -0.693359375, y));
    var s = 1.9875691500e-4;
    s = fma(r, s, 1.3981999507e-3);
    s = fma(r, s, 8.3334519073e-3);
    s = fma(r, s, 4.1665795894e-2);
    s = fma(r, s, 1.6666665459e-1);
    s = fma(r, s, 5.0000001201e-1);
    let half = i32(n) / 2;
    return (1.0 + fma(r * r, s, r)) * power_of_two(half) * power_of_two(i32(n) - half);
}

// 2^n, n between -126 and 127.
fn power_of_two(n: i32) -> f32 { return bitcast<f32>(u32(n + 127) << 23u); }

// ln(1 + x), for x between -0.3 and 1: as 2 artanh(x / (2 + x)).
fn logarithm_of_one_and(x: f32) -> f32 {
    let s = x / (2.0 + x);
    let z = s * s;
    var sum = 1.0 / 15.0;
    sum = fma(z, sum, 1.0 / 13.0);
    sum = fma(z, sum, 1.0 / 11.0);
    sum = fma(z, sum, 1.0 / 9.0);
    sum = fma(z, sum, 1.0 / 7.0);
    sum = fma(z, sum, 1.0 / 5.0);
    sum = fma(z, sum, 1.0 / 3.0);
    return 2.0 * fma(s * z, sum, s);
}

// ln(x * 2^n), for positive x from 2^-126 on that are finite.
fn logarithm(x: f32, n: f32) -> f32 {
    let bits = bitcast<u32>(x);
    // mantissa between 0.71 and 1.41
    let up = u32((bits & 0x7fffffu) > 0x3504f3u);
    let exponent = f32((bits >> 23u) + up) - 127.0 + n;
    let mantissa = bitcast<f32>((bits & 0x7fffffu) | (0x3f800000u - (up << 23u)));
    return fma(exponent, 0.693359375, fma(exponent, -2.12194440e-4, logarithm_of_one_and(mantissa - 1.0)));
}

// x^y for x >= 0 and y > 0; what is not finite stays as it is.
fn power(x: f32, y: f32) -> f32 {
    let bits = bitcast<u32>(x);
    if (bits == 0u || bits >= 0x7f800000u) { return x; }
    if (bits >= 0x00800000u) { return exponential(y * logarithm(x, 0.0)); }
    let scaled = x * 16777216.0;
    if (bitcast<u32>(scaled) == 0u) { return 0.0; }
    return exponential(y * logarithm(scaled, -24.0));
}
