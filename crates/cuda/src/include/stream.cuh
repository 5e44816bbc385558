// Read once: not to be kept in the first-level cache. Zeros if not `inside`. Volatile, so that loads stay together.
template <class W, int N> __device__ __forceinline__ Pack<W, N> stream(const W* from, bool inside) {
    Pack<W, N> pack = {};
    if (sizeof(pack) == 16) {
        uint4 v;
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
            "@p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];}"
            : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
            : "l"(from), "r"((u32)inside));
        memcpy(&pack, &v, sizeof(pack));
    } else if (inside) {
        pack = *reinterpret_cast<const Pack<W, N>*>(from);
    }
    return pack;
}
