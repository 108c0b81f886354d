// Sampling with avx512 code.
#define AFD_ISA afd_sample_avx512
#define AFD_LANES 16
#define AFD_BF16_DOT 0
#include "sample_rows.h"

namespace afd {
extern const SampleTable sample_avx512 = AFD_ISA::make_sample_table();
}
