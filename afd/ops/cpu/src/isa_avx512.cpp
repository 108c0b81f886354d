// AVX-512 (F, BW, VL, DQ) + AVX512_BF16 + AVX512_VNNI.
#define AFD_ISA afd_avx512
#define AFD_LANES 16
#define AFD_BF16_DOT 1
#include "isa_table.h"

namespace afd {
extern const KernelTable kernels_avx512 = AFD_ISA::make_table("avx512");
}
