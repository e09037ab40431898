// RWKV-4's WKV and its gradient. Lanes are channels; sums are a, b in units of e^m, so that no exponent overflows.
#include <stdlib.h>
#include "vector.h"

#define AT(p, i) ((char *)(p) + (i) * (half ? 2 : 4))
#define STEPS 32  // tokens between states that are kept for backward
#define NOTHING -1e38f

INLINE vf take(const void *p, int64_t n, const int half) { return n >= W ? load(p, 0, half) : load_n(p, 0, n, 0, half); }
INLINE void give(void *p, int64_t n, vf x, const int half) {
    if (n >= W)
        store(p, 0, x, half);
    else
        store_n(p, 0, n, x, half);
}

typedef struct {
    vf a, b, m;
} Sums;

// The factors of what has the exponents x and y, in units of the larger one; one of them is 1.
INLINE vf units(vf x, vf y, vf *fx, vf *fy) {
    const vf d = x - y, e = vexp(-vmax(d, -d));
    *fx = select_(d >= 0, splat(1), e), *fy = select_(d >= 0, e, splat(1));
    return vmax(x, y);
}

INLINE Sums take_sums(const float *p, int64_t C, int64_t n) {
    Sums s = {take(p, n, 0), take(p + C, n, 0), take(p + 2 * C, n, 0)};
    s.m = select_(s.b == 0, splat(NOTHING), s.m);
    return s;
}
INLINE void give_sums(float *p, int64_t C, int64_t n, Sums s) {
    give(p, n, s.a, 0), give(p + C, n, s.b, 0), give(p + 2 * C, n, select_(s.b == 0, splat(0), s.m), 0);
}

INLINE Sums step(Sums s, vf k, vf v, vf w) {
    vf old, new;
    const vf m = units(s.m + w, k, &old, &new);
    return (Sums){s.a * old + v * new, s.b * old + new, m};
}

// k, v [tokens, C] with row strides; w, u [C]; state [sequences, 3, C]: before, then after; kept [pieces, 3, C] or null.
INLINE void wkv(const char *k, const char *v, int64_t k_ld, int64_t v_ld, const float *w, const float *u, const int64_t *spans,
                int64_t sequences, int64_t C, float *state, float *kept, char *y, int threads, const int half) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < C; c += W) {
        const int64_t n = C - c;
        const vf w_ = take(w + c, n, 0), u_ = take(u + c, n, 0);
        float *to = kept;
        for (int64_t i = 0; i < sequences; i++) {
            Sums s = take_sums(state + 3 * i * C + c, C, n);
            for (int64_t t = 0; t < spans[2 * i + 1]; t++) {
                if (kept && t % STEPS == 0) give_sums(to + c, C, n, s), to += 3 * C;
                const int64_t at = spans[2 * i] + t;
                const vf kt = take(AT(k, at * k_ld + c), n, half), vt = take(AT(v, at * v_ld + c), n, half);
                vf old, new;
                units(s.m, u_ + kt, &old, &new);
                give(AT(y, at * C + c), n, (s.a * old + vt * new) / (s.b * old + new), half);
                s = step(s, kt, vt, w_);
            }
            give_sums(state + 3 * i * C + c, C, n, s);
        }
    }
}

// With N and D numerator and denominator of y at t: dN = dy / D, dD = -dy y / D, and the gradients G, H of the sums after t
// follow backwards from G = e^w G + dN, H = e^w H + dD; they too have a unit, e^p. dstate: of the states after, then before;
// of its three rows the last is none. dw, du [C].
INLINE void wkv_backward(const char *k, const char *v, int64_t k_ld, int64_t v_ld, const float *w, const float *u,
                         const int64_t *spans, int64_t sequences, int64_t C, const float *kept, const float *final,
                         const char *dy, float *dstate, char *dk, char *dv, float *dw, float *du, int threads, const int half) {
    int64_t pieces = 0;
    for (int64_t i = 0; i < sequences; i++) pieces += (spans[2 * i + 1] + STEPS - 1) / STEPS;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < C; c += W) {
        const int64_t n = C - c;
        const vf w_ = take(w + c, n, 0), u_ = take(u + c, n, 0);
        vf dw_ = splat(0), du_ = splat(0);
        const float *from = kept + 3 * pieces * C;
        for (int64_t i = sequences - 1; i >= 0; i--) {
            float *ds = dstate + 3 * i * C + c;
            vf G = take(ds, n, 0), H = take(ds + C, n, 0), p = -take_sums(final + 3 * i * C + c, C, n).m;
            p = select_((G == 0) & (H == 0), splat(NOTHING), p);
            for (int64_t first = (spans[2 * i + 1] - 1) / STEPS * STEPS; first >= 0 && spans[2 * i + 1]; first -= STEPS) {
                const int64_t count = MIN(STEPS, spans[2 * i + 1] - first), start = spans[2 * i] + first;
                Sums s[STEPS + 1];
                from -= 3 * C;
                s[0] = take_sums(from + c, C, n);
                for (int64_t t = 0; t < count - 1; t++)
                    s[t + 1] = step(s[t], take(AT(k, (start + t) * k_ld + c), n, half),
                                    take(AT(v, (start + t) * v_ld + c), n, half), w_);
                for (int64_t t = count - 1; t >= 0; t--) {
                    const vf kt = take(AT(k, (start + t) * k_ld + c), n, half), vt = take(AT(v, (start + t) * v_ld + c), n, half);
                    vf old, new, grown, fresh;
                    const vf m = units(s[t].m, u_ + kt, &old, &new);
                    const vf D = s[t].b * old + new, y = (s[t].a * old + vt * new) / D;
                    const vf dN = take(AT(dy, (start + t) * C + c), n, half) / D, dD = -dN * y;  // in units of e^-m
                    const vf later = vexp(vmin(kt + p, splat(0))), here = new * (vt * dN + dD);
                    give(AT(dv, (start + t) * C + c), n, later * G + new * dN, half);
                    give(AT(dk, (start + t) * C + c), n, later * (vt * G + H) + here, half);
                    du_ += here;
                    dw_ += vexp(vmin(s[t].m + w_ + p, splat(0))) * (s[t].a * G + s[t].b * H);
                    p = units(p + w_, -m, &grown, &fresh);
                    G = G * grown + dN * fresh, H = H * grown + dD * fresh;
                }
            }
            const vf m = spans[2 * i + 1] ? take_sums(from + c, C, n).m : -p;
            const vf back = vexp(vmin(m + p, splat(0)));
            give(ds, n, G * back, 0), give(ds + C, n, H * back, 0), give(ds + 2 * C, n, splat(0), 0);
        }
        give(dw + c, n, dw_, 0), give(du + c, n, du_, 0);
    }
}

#define EXPORT(NAME, HALF)                                                                                                     \
    void wkv_##NAME(const char *k, const char *v, int64_t k_ld, int64_t v_ld, const float *w, const float *u,                  \
                    const int64_t *spans, int64_t sequences, int64_t C, float *state, float *kept, char *y, int threads) {     \
        wkv(k, v, k_ld, v_ld, w, u, spans, sequences, C, state, kept, y, threads, HALF);                                       \
    }                                                                                                                          \
    void wkv_backward_##NAME(const char *k, const char *v, int64_t k_ld, int64_t v_ld, const float *w, const float *u,         \
                             const int64_t *spans, int64_t sequences, int64_t C, const float *kept, const float *final,        \
                             const char *dy, float *dstate, char *dk, char *dv, float *dw, float *du, int threads) {           \
        wkv_backward(k, v, k_ld, v_ld, w, u, spans, sequences, C, kept, final, dy, dstate, dk, dv, dw, du, threads, HALF);     \
    }

EXPORT(f32, 0)
EXPORT(bf16, 1)
