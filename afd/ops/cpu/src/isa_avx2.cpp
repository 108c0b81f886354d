// AVX2 + FMA.
#define AFD_ISA afd_avx2
#define AFD_LANES 8
#define AFD_BF16_DOT 0
#include "isa_table.h"

namespace afd {
extern const KernelTable kernels_avx2 = AFD_ISA::make_table("avx2");
}
