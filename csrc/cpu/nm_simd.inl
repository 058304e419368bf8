// Included by nm_simd.cpp once for each instruction set, inside that set's namespace and target.
#include "cpu/vec.inl"
#include "cpu/nm_sparsity.inl"
#include "cpu/masked_update.inl"
