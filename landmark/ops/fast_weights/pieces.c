// What is between the matrix products of a memory that learns: gelu with its derivatives, and the gradient of a loss
// behind a LayerNorm with its own gradient. float32.
#include "vector.h"

#define PARALLEL() _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")

INLINE vf take(const float *p, int64_t i, int64_t n) { return i + W <= n ? load(p, i, 0) : load_n(p, i, n - i, 0, 0); }
INLINE void give(float *p, int64_t i, int64_t n, vf x) {
    if (i + W <= n)
        store(p, i, x, 0);
    else
        store_n(p, i, n - i, x, 0);
}

// y = gelu(x), d = gelu'(x) and, if not null, dd = gelu''(x).
INLINE void gelu(const float *x, float *y, float *d, float *dd, int64_t n, int threads, const int tanh_) {
    PARALLEL()
    for (int64_t i = 0; i < n; i += W) {
        vf u = take(x, i, n), value, first, second;
        if (tanh_) {  // u (1 + t) / 2, t = tanh(c (u + a u^3))
            const float c = 0.79788456f, a = 0.044715f;
            vf s = u * u, v = c * u * (1.0f + a * s), slope = c * (1.0f + 3.0f * a * s);
            vf e = vexp(-2.0f * vmax(v, -v)), inverse = 1.0f / (1.0f + e), t = (1.0f - e) * inverse;
            vf rest = 4.0f * e * inverse * inverse;  // 1 - t^2, without its cancellation
            t = select_(v < 0, -t, t);
            value = 0.5f * u * (1.0f + t);
            first = 0.5f * (1.0f + t) + 0.5f * u * rest * slope;
            second = rest * (slope + u * (3.0f * a * c) * u - u * t * slope * slope);
        } else {  // u phi(u)
            vf phi = vphi(u), density = 0.39894228f * vexp(-0.5f * u * u);
            value = u * phi;
            first = phi + u * density;
            second = density * (2.0f - u * u);
        }
        give(y, i, n, value);
        give(d, i, n, first);
        if (dd) give(dd, i, n, second);
    }
}

void gelu_erf(const float *x, float *y, float *d, float *dd, int64_t n, int threads) { gelu(x, y, d, dd, n, threads, 0); }
void gelu_tanh(const float *x, float *y, float *d, float *dd, int64_t n, int threads) { gelu(x, y, d, dd, n, threads, 1); }

#define EACH(i) for (int64_t i = 0; i < n; i += W)

// Rows of n: hat = (z - mean) r, r = 1 / sqrt(var + eps), a = goal + gain hat, g = r (a - mean(a) - hat mean(a hat)).
// gain has one row for `shared` rows of z.
void loss_gradient(const float *z, const float *goal, const float *gain, float *g, float *hat, float *r, int64_t rows,
                   int64_t n, int64_t shared, float eps, int threads) {
    PARALLEL()
    for (int64_t row = 0; row < rows; row++) {
        const float *zr = z + row * n, *ur = goal + row * n, *kr = gain + row / shared * n;
        float *hr = hat + row * n, *gr = g + row * n;
        vf total = splat(0), squares = total;
        EACH(i) total += take(zr, i, n);
        const float mean = sum(total) / (float)n;
        for (int64_t i = 0; i < n; i += W) {
            vf x = i + W <= n ? load(zr, i, 0) - mean : load_n(zr, i, n - i, mean, 0) - mean;
            squares += x * x;
        }
        const float k = 1 / sqrtf(sum(squares) / (float)n + eps);
        r[row] = k;
        vf sa = splat(0), sah = sa;
        EACH(i) {
            vf h = (take(zr, i, n) - mean) * k;
            give(hr, i, n, h);
            vf a = take(ur, i, n) + take(kr, i, n) * h;
            give(gr, i, n, a);
            if (i + W > n) a = take(gr, i, n);
            sa += a;
            sah += a * h;
        }
        const float ma = sum(sa) / (float)n, mah = sum(sah) / (float)n;
        EACH(i) give(gr, i, n, k * (take(gr, i, n) - ma - take(hr, i, n) * mah));
    }
}

// Given y = d loss / d g: gradients with respect to z and goal, and those of gain, not yet summed over tokens.
void loss_gradient_backward(const float *y, const float *g, const float *hat, const float *r, const float *goal,
                            const float *gain, float *dz, float *dgoal, float *dgain, int64_t rows, int64_t n,
                            int64_t shared, int threads) {
    PARALLEL()
    for (int64_t row = 0; row < rows; row++) {
        const float *yr = y + row * n, *gr = g + row * n, *hr = hat + row * n, *ur = goal + row * n,
                    *kr = gain + row / shared * n;
        float *zr = dz + row * n, *du = dgoal + row * n, *dk = dgain + row * n;
        const float k = r[row];
        vf sy = splat(0), syh = sy, syg = sy, sah = sy;
        EACH(i) {
            vf p = take(yr, i, n), h = take(hr, i, n), a = take(ur, i, n) + take(kr, i, n) * h;
            sy += p;
            syh += p * h;
            syg += p * take(gr, i, n);
            sah += a * h;
        }
        const float my = sum(sy) / (float)n, myh = sum(syh) / (float)n, myg = sum(syg) / (float)n, mah = sum(sah) / (float)n;
        vf sd = splat(0), sdh = sd;
        EACH(i) {
            vf p = take(yr, i, n), h = take(hr, i, n), q = take(kr, i, n), a = take(ur, i, n) + q * h;
            vf da = k * (p - my - h * myh), dh = q * da - k * (mah * p + myh * a);
            give(du, i, n, da);
            give(dk, i, n, da * h);
            give(zr, i, n, dh);
            if (i + W > n) dh = take(zr, i, n);
            sd += dh;
            sdh += dh * h;
        }
        const float md = sum(sd) / (float)n, mdh = sum(sdh) / (float)n;
        EACH(i) give(zr, i, n, k * (take(zr, i, n) - md - take(hr, i, n) * (mdh + myg)));
    }
}
