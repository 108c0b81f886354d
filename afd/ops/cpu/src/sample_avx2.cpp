// Sampling with avx2 code.
#define AFD_ISA afd_sample_avx2
#define AFD_LANES 8
#define AFD_BF16_DOT 0
#include "sample_rows.h"

namespace afd {
extern const SampleTable sample_avx2 = AFD_ISA::make_sample_table();
}
