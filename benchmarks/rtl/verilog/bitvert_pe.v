// BitVert PE with bi-directional bit sparsity (Chen et al., MICRO 2024): bit columns of a group of
// eight two's complement weights. Of each column at most half the bits are effectual: where more are
// ones, the activations under the zeros are taken from the sum of all, which is resident too. So four
// selectors serve eight lanes; the accumulator moves up a bit a column, the sign column first.
module bitvert_pe #(
    parameter LANES = 8,
    parameter WIDTH = 8,
    parameter PSUM = 28,
    parameter PICKS = LANES / 2
) (
    input                        clock,
    input                        reset,
    input                        load,
    input      [LANES*WIDTH-1:0] activations_in,  // the column's bus, unsigned
    input      [PICKS*4+1:0]     step_in,         // {sign column, inverted, picks {valid, index}}
    input                        last_in,
    output reg [PICKS*4+1:0]     step,
    output reg                   last,
    input      [PSUM-1:0]        psum_in,
    output     [PSUM-1:0]        psum
);
    localparam SUM = 2 * WIDTH + $clog2(LANES) + 1;
    localparam TREE = WIDTH + $clog2(LANES);

    reg  [LANES*WIDTH-1:0] activations;
    wire [PICKS*SUM-1:0] picked;
    wire [LANES*TREE-1:0] resident;
    wire [TREE-1:0] all_sum, all_carry, all;
    wire [SUM-1:0] sum, carry, first_sum, first_carry;
    wire subtract = step_in[PICKS*4 + 1];
    wire inverted = step_in[PICKS*4];
    genvar i;
    generate
        for (i = 0; i < LANES; i = i + 1) begin : lane
            assign resident[i*TREE +: TREE] =
                {{(TREE-WIDTH){1'b0}}, activations[i*WIDTH +: WIDTH]};
        end
        for (i = 0; i < PICKS; i = i + 1) begin : pick
            wire [WIDTH-1:0] x = activations[step_in[i*4 +: 3]*WIDTH +: WIDTH]
                                 & {WIDTH{step_in[i*4 + 3]}};
            assign picked[i*SUM +: SUM] = {{(SUM-WIDTH){1'b0}}, x};
        end
    endgenerate
    // The sum of all changes with a fold alone.
    carry_save_tree #(.WORDS(LANES), .WIDTH(TREE)) all_tree (
        .words(resident), .low({(LANES-2){1'b0}}), .sum(all_sum), .carry(all_carry)
    );
    ripple_adder #(.WIDTH(TREE)) all_adder (.a(all_sum), .b(all_carry), .sum(all));
    carry_save_tree #(.WORDS(PICKS), .WIDTH(SUM)) tree (
        .words(picked), .low({(PICKS-2){1'b0}}), .sum(sum), .carry(carry)
    );
    // column = picked, or all - picked; minus that in the sign column.
    wire flip = inverted ^ subtract;
    wire [SUM-1:0] whole = {{(SUM-TREE){1'b0}}, all & {TREE{inverted}}};
    carry_save #(.WIDTH(SUM)) joined (
        .a(sum ^ {SUM{flip}}), .b(carry ^ {SUM{flip}}), .c(whole ^ {SUM{subtract}}), .low(flip),
        .sum(first_sum), .carry(first_carry)
    );
    late_sum #(.SUM(SUM), .PSUM(PSUM), .UP(1)) back (
        .clock(clock), .reset(reset), .a(first_sum), .b(first_carry),
        .carry_in({flip, subtract}), .last_in(last_in), .psum_in(psum_in), .psum(psum)
    );
    always @(posedge clock) begin
        if (load) activations <= activations_in;
        step <= step_in;
        last <= last_in & ~reset;
    end
endmodule
